from __future__ import annotations

import pytest

# Its assertions speak for the job that failed.
pytest.register_assert_rewrite("tests.launchers")
