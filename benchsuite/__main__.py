"""`python -m benchsuite` is the command line."""

import sys

from benchsuite.cli.main import main

sys.exit(main())
