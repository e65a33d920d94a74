"""Where things are: the checkout, the golden files, what published models say of themselves."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "golden"
PUBLISHED_MODELS = Path(__file__).with_name("published_models.json")
