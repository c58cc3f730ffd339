#!/usr/bin/env bash
# ./setup.sh        makes ./env and installs what running needs
# ./setup.sh demo   the same, then pretrains a small model and shows what is in it (minutes, no download of data)
# ./setup.sh test   the same with the test requirements, then runs the tests
# ./setup.sh lint   the same with ruff and mypy, then checks style and types
# PYTHON=python3.12 ./setup.sh chooses the interpreter of a new ./env.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

die() {
    echo "setup.sh: $*" >&2
    exit 1
}

# Installs once per state of its arguments and the requirement files: install NAME PIP_ARGUMENT...
install() {
    local name=$1 state
    shift
    state=$({ echo "$*" && cat requirements.txt pyproject.toml; } | cksum)
    [ "$(cat "env/installed-$name" 2>/dev/null)" = "$state" ] && return
    echo "setup.sh: installing $* into ./env"
    env/bin/python -m pip install --quiet "$@" || die "pip could not install '$*'; its message is above."
    echo "$state" >"env/installed-$name"
}

mode=${1:-install}
case $mode in install | demo | test | lint) ;; *) die "unknown argument '$mode': use no argument, demo, test or lint." ;; esac

if [ -e env ] && [ ! -e env/pyvenv.cfg ]; then
    die "./env is no Python environment, and is not overwritten; move it away."
fi
is_recent='import sys; sys.exit(sys.version_info < (3, 11))'
if ! env/bin/python -c "$is_recent" 2>/dev/null || ! env/bin/python -m pip --version >/dev/null 2>&1; then
    python=${PYTHON:-python3}
    "$python" -c "$is_recent" || die "'$python' is missing or older than Python 3.11; name another with PYTHON=..."
    "$python" -m venv --clear env || die "'$python -m venv env' failed; on Debian and Ubuntu install python3-venv."
fi
# One release of torch rather than a range: where pip's sources hold a CPU build of it, that one is taken.
install torch torch==2.13.0
install run -r requirements.txt

case $mode in
demo)
    page=models/demo.html
    env/bin/python run_language_modeling.py configs/demo.json
    rm -f "$page" # that of an earlier demo
    env/bin/python interpret_lambdas.py map "This method [MASK] called when the object is created." \
        --model models/demo --output "$page"
    echo "Open $page in a browser to see what the model's lambdas hold."
    exit
    ;;
test)
    install test --editable '.[test]'
    exec env/bin/python -m pytest tests
    ;;
lint)
    install dev --editable '.[dev]'
    env/bin/python -m ruff check .
    env/bin/python -m ruff format --check .
    exec env/bin/python -m mypy
    ;;
esac
echo "Installed. Next: source env/bin/activate, then see README.md."
