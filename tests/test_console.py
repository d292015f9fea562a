from cxr import console


def test_names_with_brackets_are_shown_as_they_are(capsys):
    console.table("c[/b]d", ("a", "b"), [("scan[red].png", 1)])
    shown = capsys.readouterr().out
    assert "c[/b]d" in shown and "scan[red].png" in shown


def test_messages_go_to_stderr_in_one_unwrapped_line(capsys):
    console.warn("x" * 300 + " [bold]")
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err == "warning: " + "x" * 300 + " [bold]\n"
