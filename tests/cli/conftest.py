"""What the tests of the whole way through the command line share."""

import pytest

from motionrag import cli


@pytest.fixture
def command(capfd):
    """Run the command line; returns exit code, output and the error line."""

    def command(*words):
        code = cli.main(list(words))
        out, err = capfd.readouterr()
        errors = [line for line in err.splitlines() if line.startswith("error: ")]
        assert len(errors) == (code != 0), err
        return code, out, (errors or [""])[0]

    return command
