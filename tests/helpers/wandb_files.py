"""What wandb writes offline. Its package has no reader in Python any more, so that the file is read here."""

import struct
import time

from wandb.proto.wandb_internal_pb2 import Record


def records(file):
    """The format is LevelDB's log: blocks of 32 KiB, a header of 7 bytes before each part of a record."""
    data, at, whole = file.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:  # the rest of a block
            at += 32768 - at % 32768
            continue
        size, kind = struct.unpack_from("<HB", data, at + 4)
        whole += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or the last part
            yield Record.FromString(whole)
            whole = b""


def whole_run(file):
    """wandb writes in a process of its own, and may not be done when `finish` returns: the last record is an exit."""
    for _ in range(300):
        found = list(records(file))
        if found and found[-1].HasField("exit"):
            return found
        time.sleep(0.1)
    raise AssertionError(f"{file} has no end.")
