#!/usr/bin/env python
"""Checkpoints from Hugging Face's form to megatron-core's and back: python tools/convert.py --help"""

import sys

from megatron_rl.convert.main import main

if __name__ == "__main__":
    sys.exit(main())
