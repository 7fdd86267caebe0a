"""What a run's record says of the last rows."""

from __future__ import annotations

from pathlib import Path

import torch

from pretrain.record import Record


def record_of(folder: Path, rows: list[list[dict[str, float]]]) -> Record:
    """Rows, each of some batches' terms."""
    record = Record(folder, steps=100, first_step=0, chance={}, seconds=0.0)
    for number, batches in enumerate(rows, start=1):
        for terms in batches:
            record.add({name: torch.tensor(value) for name, value in terms.items()}, waited=0.0)
        record.write(number, "main", 0.1, None, None)
    record.close()
    return record


def test_recent_terms_are_means_over_the_last_five_rows(tmp_path: Path) -> None:
    assert record_of(tmp_path, [[{"loss": float(n)}] for n in (100, 1, 2, 3, 4, 10)]).recent == {"loss": 4.0}


def test_a_recent_term_is_averaged_over_the_rows_that_have_it(tmp_path: Path) -> None:
    rows = [[{"loss": 1.0, "acc": 0.5}], [{"loss": 2.0}], [{"loss": 3.0, "acc": 1.0}]]
    assert record_of(tmp_path, rows).recent == {"loss": 2.0, "acc": 0.75}


def test_a_row_without_a_term_leaves_it_out_of_what_is_recent(tmp_path: Path) -> None:
    assert record_of(tmp_path, [[{"loss": 1.0, "acc": 0.5}], [{"loss": 2.0}]]).recent == {"loss": 1.5}


def test_each_row_counts_once_however_many_batches_it_has(tmp_path: Path) -> None:
    assert record_of(tmp_path, [[{"loss": 1.0}, {"loss": 3.0}], [{"loss": 8.0}]]).recent == {"loss": 5.0}


def test_nothing_is_recent_before_the_first_row(tmp_path: Path) -> None:
    assert record_of(tmp_path, []).recent == {}
    assert record_of(tmp_path, [[]]).recent == {}
