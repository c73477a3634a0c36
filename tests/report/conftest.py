from __future__ import annotations

from pathlib import Path

import pytest
from report_samples import whole_run

from clinkd.report.html import build_report


@pytest.fixture(scope="session")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The whole run's report, made once."""
    return build_report(whole_run(), tmp_path_factory.mktemp("report") / "report.html")
