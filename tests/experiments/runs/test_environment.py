"""What a run notes of the code that made it."""

import subprocess

from experiments.runs import metrics


def git(folder, *arguments):
    asked = ["git", "-C", folder, "-c", "user.name=a", "-c", "user.email=a@b", *arguments]
    done = subprocess.run(asked, check=True, capture_output=True, text=True)
    return done.stdout.strip()


def checkout(folder, monkeypatch):
    """A repository in which this code is said to be."""
    place = folder / "experiments" / "runs" / "metrics.py"
    place.parent.mkdir(parents=True)
    place.write_text("1")
    git(folder, "init", "-q")
    git(folder, "add", "-A")
    git(folder, "commit", "-q", "-m", "a")
    monkeypatch.setattr(metrics, "__file__", str(place))
    return place


def test_the_commit_is_that_of_the_checkout_and_says_what_was_changed(tmp_path, monkeypatch):
    place = checkout(tmp_path, monkeypatch)
    head = git(tmp_path, "rev-parse", "HEAD")
    assert metrics._commit() == head[:10]
    place.write_text("2")
    assert metrics._commit() == f"{head[:10]} with changes"


def test_code_that_is_in_no_checkout_of_its_own_has_no_commit(tmp_path, monkeypatch):
    checkout(tmp_path / "theirs", monkeypatch)
    for place in (tmp_path / "theirs" / "venv", tmp_path / "none"):  # another's, and none at all
        code = place / "experiments" / "runs" / "metrics.py"
        code.parent.mkdir(parents=True)
        monkeypatch.setattr(metrics, "__file__", str(code))
        assert metrics._commit() is None
