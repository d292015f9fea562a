import pytest

from cxr import CxrError, UsageError, console, options


def test_names_with_brackets_are_shown_as_they_are(capsys):
    console.table("c[/b]d", ("a", "b"), [("scan[red].png", 1)])
    shown = capsys.readouterr().out
    assert "c[/b]d" in shown and "scan[red].png" in shown


def test_messages_go_to_stderr_in_one_unwrapped_line(capsys):
    console.warn("x" * 300 + " [bold]")
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err == "warning: " + "x" * 300 + " [bold]\n"


NASTY = "a\x1b[31m\x1b]0;owned\x07\nb\r\u202e\x9bc\udcff\u2028"
SHOWN = r"a\x1b[31m\x1b]0;owned\x07\nb\r\u202e\x9bc\udcff\u2028"


def test_control_characters_are_shown_as_their_escapes(capsys):
    assert console.plain(NASTY) == SHOWN
    assert console.plain("Müller, 肺炎 [x] Ω") == "Müller, 肺炎 [x] Ω"
    console.warn(NASTY)
    assert capsys.readouterr().err == f"warning: {SHOWN}\n"
    console.table(NASTY, ("x", NASTY), [(NASTY, 1)])
    shown = capsys.readouterr().out
    assert shown.replace("\n", "").isprintable()


def test_a_lack_of_memory_is_said(capsys):
    for error in (
        MemoryError(),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate"),
    ):
        assert options.complain(error) == 1
        assert "out of memory: take a smaller --batch" in capsys.readouterr().err
    with pytest.raises(RuntimeError, match="a bug"):
        options.complain(RuntimeError("a bug"))


def test_an_error_is_one_line_without_control_characters(capsys):
    for error in (CxrError(NASTY), UsageError(NASTY), OSError(2, "gone", NASTY)):
        options.complain(error)
        shown = capsys.readouterr().err
        assert shown.removesuffix("\n").isprintable() and "owned" in shown
