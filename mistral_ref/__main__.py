"""`python -m mistral_ref` does the same as the command `mistral-ref`."""

import sys

from mistral_ref.cli import main

sys.exit(main())
