"""What the plugin raises. Both are ValueErrors whose message says all that a user needs."""


class SettingError(ValueError):
    """A setting of a configuration is wrong; the message names it."""


class PretrainedError(ValueError):
    """A classification checkpoint cannot be read, or does not fit the backbone; the message names the file."""
