"""A tuned table in place of the shipped one of its architecture."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastgpt2.kernels import tuning
from tests.bench.programme import run

USES = """
import json, sys
from pathlib import Path
from fastgpt2.kernels import tuning

key = ("sm_90", "attention_forward", "bfloat16", 64)
print(tuning.configuration(*key).block_m)
table = tuning.read_table("sm_90")
for entry in table["entries"]:
    entry["config"]["block_m"] = 7
path = Path(sys.argv[1]) / "sm_90.json"
path.write_text(json.dumps(table))
tuning.use_table(path)
print(tuning.configuration(*key).block_m, tuning.configuration("sm_80", *key[1:]).block_m)
"""


def test_a_tuned_table_takes_the_place_of_the_architectures_own(tmp_path: Path) -> None:
    done = run("-c", USES, str(tmp_path))
    own, tuned, other = done.stdout.split()
    assert tuned == "7" != own and other != "7", done.stderr


NO_TABLES = {
    "tuned.json": ('{"entries": [], "shared_memory": 1}', "not named after an architecture: sm_80"),
    "sm_90.json": ("", "can't be read as a table"),
    "sm_80.json": ("[]", "is not a table: it has no entries"),
    "sm_100.json": (None, "can't be read as a table"),
}


@pytest.mark.parametrize("name", NO_TABLES)
def test_a_file_that_is_no_table_is_refused(name: str, tmp_path: Path) -> None:
    path, (text, reason) = tmp_path / name, NO_TABLES[name]
    if text is not None:
        path.write_text(text)
    with pytest.raises(ValueError, match=reason) as refused:
        tuning.use_table(path)
    assert "\n" not in str(refused.value) and path not in tuning._instead.values()
