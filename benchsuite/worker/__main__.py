"""`python -m benchsuite.worker` is what a user's own torchrun starts: a supervisor that forks one
process per cell.

The supervisor must not import torch.
"""

import sys

from benchsuite.cluster.rank_supervisor import main

sys.exit(main(sys.argv[1:]))
