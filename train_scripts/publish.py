"""Publish a network on the Hugging Face Hub: safetensors, config.json, the card, the picture of its wiring.

``--help`` has the options; the code is :mod:`dg_timm.cli.publish`.
"""

from dg_timm.cli.publish import main

if __name__ == "__main__":
    raise SystemExit(main())
