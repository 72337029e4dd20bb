"""``python -m dg_timm`` is ``dg-timm``."""

from dg_timm_cli import main

if __name__ == "__main__":
    raise SystemExit(main())
