"""The demo at its smallest: both paths give the same losses, and the table, the picture and the numbers appear."""

import json

import pytest

from nca_kernels import cli

pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("matplotlib", reason="matplotlib is not installed")


def test_both_paths_give_the_same_losses(tmp_path, capsys, default_dispatch):
    losses = {}
    for path in ("linear", "logits"):
        out = tmp_path / path
        assert cli.main(["demo", "--quick", "--path", path, "--out", str(out)]) == 0
        printed = capsys.readouterr().out
        assert all(name in printed for name in ("supervised", "DPO", "NCA", "InfoNCA", "chosen log-prob"))
        assert (out / "figure2.png").read_bytes().startswith(b"\x89PNG")
        results = json.loads((out / "demo.json").read_text())["results"]
        losses[path] = [results[name]["curves"]["loss"] for name in results if name != "supervised"]
    for linear, logits in zip(losses["linear"], losses["logits"], strict=True):
        assert linear == pytest.approx(logits, rel=1e-3)


def test_exit_codes(tmp_path, capsys):
    with pytest.raises(SystemExit) as usage:
        cli.main(["demo", "--path", "guess"])
    assert usage.value.code == 2
    (tmp_path / "file").write_text("")
    assert cli.main(["demo", "--quick", "--out", str(tmp_path / "file")]) == 1
    assert "nca-kernels demo:" in capsys.readouterr().err
