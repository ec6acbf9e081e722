"""The built files of the studio's page: of the sources beside them, small, and loading nothing from elsewhere."""

import hashlib
import re

from common import ROOT

STATIC, SOURCES = ROOT / "instdiff_jax" / "serving" / "static", ROOT / "studio"


def test_they_are_built_from_the_sources():
    names = ["package.json", *sorted(f"src/{path.name}" for path in (SOURCES / "src").iterdir())]
    digest = hashlib.sha256(b"".join((SOURCES / name).read_bytes() for name in names)).hexdigest()
    assert (STATIC / "sources.sha256").read_text().strip() == digest, "run npm ci && npm run build in studio/"


def test_they_are_small_and_load_nothing_from_elsewhere():
    for path in STATIC.iterdir():
        assert path.stat().st_size < 1_000_000
        if path.suffix in (".html", ".css"):
            addresses = re.findall(r"""(?:src|href|url)\s*[=(]\s*["']?(?:https?:)?//[^"')\s]+""", path.read_text())
            assert not addresses
