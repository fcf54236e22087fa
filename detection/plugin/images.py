"""Images are read whole, or not at all. OpenCV, by which mmcv decodes, fills the rest of a cut-off JPEG with gray."""

from __future__ import annotations

import io
from typing import Any

import mmcv
from mmcv.transforms import LoadImageFromFile
from mmdet.registry import TRANSFORMS
from mmengine import fileio
from PIL import Image

from detection.plugin.errors import BrokenImage, UnreadableImage

JPEG, END = b"\xff\xd8", b"\xff\xd9"


@TRANSFORMS.register_module()
class LoadWholeImage(LoadImageFromFile):
    """`LoadImageFromFile`, whose arguments it takes, but an incomplete image is an error.

    Raises:
        BrokenImage: the file is not a complete image.
        UnreadableImage: the file cannot be read.
    """

    def transform(self, results: dict[str, Any]) -> dict[str, Any]:
        path = results["img_path"]
        try:
            content = fileio.get(path, backend_args=self.backend_args)
        except OSError as error:
            raise UnreadableImage(f"{path} cannot be read: {error.strerror or error}.") from None
        try:
            check_whole(content)
            image = mmcv.imfrombytes(content, flag=self.color_type, backend=self.imdecode_backend)
            if image is None:
                raise ValueError(f"{self.imdecode_backend} cannot decode it")
        except MemoryError:  # not the file's fault
            raise
        except Exception as error:  # decoders raise nearly anything on broken files
            broken = BrokenImage(f"{path} cannot be read as an image: {error}")
            broken.path = path
            raise broken from None
        results["img"] = image.astype("float32") if self.to_float32 else image
        results["img_shape"] = results["ori_shape"] = image.shape[:2]
        return results


def check_whole(content: bytes) -> None:
    """Raises an error of Pillow's: an image is incomplete. It need not decode a JPEG that ends as one should."""
    if not (content.startswith(JPEG) and END in content[-16:]):
        Image.open(io.BytesIO(content)).load()
