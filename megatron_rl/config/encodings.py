"""Names of the encodings of pushed and converted weights; ``models/quantization_settings.py`` has what they are."""

from typing import Literal, get_args

EncodingName = Literal["fp8", "fp8_ue8m0", "fp8_channel", "int4", "mxfp4"]
ENCODINGS: tuple[EncodingName, ...] = get_args(EncodingName)
