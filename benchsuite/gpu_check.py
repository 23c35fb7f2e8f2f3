"""`python -m benchsuite.gpu_check` measures on a machine with a CUDA device; it installs
nothing."""

import sys

from benchsuite.programs.gpu.check import main

sys.exit(main(sys.argv[1:]))
