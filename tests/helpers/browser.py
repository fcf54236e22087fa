"""Pages: what they would load, and a browser to open them in, where there is one."""

import importlib.util
import shutil
from html.parser import HTMLParser

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
PLAYWRIGHT = importlib.util.find_spec("playwright") is not None


def loaded(text):
    """The elements of a page that would load something."""
    found = []

    class Parser(HTMLParser):
        def handle_starttag(self, tag, attrs):
            if (
                tag in ("link", "iframe", "object", "embed", "base")
                or {"src", "href", "srcset", "data"} & dict(attrs).keys()
            ):
                found.append((tag, attrs))

    Parser().feed(text)
    return found
