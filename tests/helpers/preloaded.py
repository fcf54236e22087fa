"""What programs in tests import, imported once by the process that they are forks of (helpers.programs).

The programs' own entry files are not among it: each run executes its own.
"""

import hydra  # noqa: F401
import sklearn.datasets  # noqa: F401
import timm  # noqa: F401
import torch.distributed.run  # noqa: F401

import train.run
import train.trainer  # noqa: F401
