import re

import pytest

import benchmarks.many_aligners as script
from lit_llama.utils import UserError


def tiny(tmp_path, **changes):
    defaults = dict(batch_size=3, prompt_tokens=4, new_tokens=2, rounds=2, adapters=50, samples=5, accelerator="cpu")
    return script.Settings(sizes=["microworld"], widths=["microworld"], out_dir=tmp_path, **{**defaults, **changes})


def test_the_report_lists_every_configuration_and_the_size_of_an_adapter(tmp_path, capsys, fixed_rates):
    script.main(tiny(tmp_path))
    report = capsys.readouterr().out
    for n in (1, 10):
        assert re.search(rf"\| N = {n}, one adapter, no bank \| [\d,.]+ \([\d,.]+ to [\d,.]+\) \| 1 \|", report)
        for different in (1, 3):
            assert re.search(
                rf"\| N = {n}, bank, {different} in the batch \| [\d,.]+ \([\d,.]+ to [\d,.]+\) \| \d\.\d+ \(", report
            )
    assert "| adapters in the bank | 50 |" in report and "| bytes per adapter, in bf16 | 480 |" in report
    assert (tmp_path / "many-aligners.md").read_text() == report
    for name in ("many-aligners.png", "many-aligners-memory.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_a_bank_stays_within_its_memory_limit(tmp_path):
    rows, points = script.measure_bank(tiny(tmp_path, adapters=10_000, memory_gb=0.001), "microworld")
    assert rows["adapters in the bank"] == f"{1_000_000 // (480 + script.NAME_BYTES):,}"
    assert points[-1][0] == 1_000_000 // (480 + script.NAME_BYTES)


def test_counts_below_one_are_refused(tmp_path):
    with pytest.raises(UserError, match="rounds is 0; it must be 1 or more"):
        script.main(tiny(tmp_path, rounds=0))
