"""A finished distillation."""

import pytest

from distillation_support import distilled


@pytest.fixture(scope="session")
def finished(text, teachers, tmp_path_factory):
    """A classifier's run that nothing interrupted; it passes through several epochs."""
    return distilled(tmp_path_factory.mktemp("finished"), text, teachers / "classifier")
