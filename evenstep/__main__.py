"""``python -m evenstep`` is the program ``evenstep``."""

import sys

from evenstep.cli import main

sys.exit(main())
