"""What all tests share. bdpo_lit is imported through jaxtyping's hook: each call is checked against the shapes it declares."""
import os
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
os.environ.setdefault("MINARI_DATASETS_PATH", str(ROOT / "data" / "minari"))   # keep data sets out of the home folder
os.environ.setdefault("MPLBACKEND", "agg")

from jaxtyping import install_import_hook  # noqa: E402

install_import_hook("bdpo_lit", "beartype.beartype")
