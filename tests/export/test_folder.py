from pathlib import Path

import pytest

from lightllm.export.folder import written_whole
from lightllm.export.report import MARKER


def write(folder: Path, text: str) -> None:
    with written_whole(folder) as unfinished:
        (unfinished / MARKER).write_text(text)


def test_a_folder_appears_at_the_end_and_replaces_an_earlier_export(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "export"
    for text in ("first", "second"):
        with written_whole(folder) as unfinished:
            (unfinished / MARKER).write_text(text)
            assert folder.exists() == (text == "second")
        assert (folder / MARKER).read_text() == text
    assert [path.name for path in folder.parent.iterdir()] == ["export"]


def test_an_error_changes_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "export"

    def fail() -> None:
        with written_whole(folder) as unfinished:
            (unfinished / MARKER).write_text("broken")
            raise RuntimeError("disk full")

    with pytest.raises(RuntimeError, match="disk full"):
        fail()
    assert list(tmp_path.iterdir()) == []
    write(folder, "good")
    with pytest.raises(RuntimeError, match="disk full"):
        fail()
    assert (folder / MARKER).read_text() == "good"
    assert list(tmp_path.iterdir()) == [folder]


def test_what_is_no_export_is_never_replaced(tmp_path: Path) -> None:
    folder = tmp_path / "thesis"
    folder.mkdir()
    (folder / "chapter1.tex").write_text("years of work")
    with pytest.raises(ValueError, match=r"thesis' is there and is no earlier export"):
        write(folder, "new")
    file = tmp_path / "file"
    file.write_text("x")
    with pytest.raises(ValueError, match="no earlier export"):
        write(file, "new")
    assert (folder / "chapter1.tex").read_text() == "years of work"
    (folder / "chapter1.tex").unlink()
    write(folder, "an empty folder will do")
    assert (folder / MARKER).is_file()


def test_the_folder_is_as_readable_as_any_other(tmp_path: Path) -> None:
    write(tmp_path / "export", "x")
    (tmp_path / "other").mkdir()
    assert (tmp_path / "export").stat().st_mode == (tmp_path / "other").stat().st_mode
