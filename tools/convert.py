#!/usr/bin/env python
"""Convert checkpoints between Hugging Face and megatron-core formats: python tools/convert.py --help"""

import sys

from megatron_rl.convert.main import main

if __name__ == "__main__":
    sys.exit(main())
