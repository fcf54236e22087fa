"""What the plugin raises. All are ValueErrors whose message says all that a user needs."""


class SettingError(ValueError):
    """A setting of a configuration is wrong; the message names it."""


class PretrainedError(ValueError):
    """A classification checkpoint cannot be read, or does not fit the backbone; the message names the file."""


class UnreadableImage(ValueError):
    """The file of an image cannot be read; the message names it."""


class BrokenImage(UnreadableImage):
    """A file was read, but is not a complete image. `path` is that of the file."""

    path = ""
