#!/usr/bin/env bash
# Makes .venv as setup.py, settings.ini and constraints.txt say, and does nothing when it already is so (decided by their hash).
#   PYTHON=python3.11       the interpreter to build on
#   KEEP_TORCH=1            keep the torch (and torchvision) that PYTHON already has, e.g. a CUDA build
#   EXTRAS=dev,eval         what to install beside the package (default: dev)
# What was chosen once holds for later calls that choose nothing; `rm -rf .venv` starts afresh.
set -euo pipefail
cd "$(dirname "$0")/.."
chosen() { sed -n "s/^$1=//p" .venv/.choices 2>/dev/null || true; }
python=${PYTHON:-$(chosen PYTHON)}
python=${python:-$(command -v python3.11 || command -v python3)}
keep=${KEEP_TORCH:-$(chosen KEEP_TORCH)}
extras=${EXTRAS:-$(chosen EXTRAS)}
extras=${extras:-dev}
say() { printf '%s\n' "$*" >&2; }

key=$( { cat setup.py settings.ini constraints.txt collectionlora/_compat.py "$0"; echo "$extras ${keep:-0} ${PIP_INSTALL_ARGS:-}"; "$python" -VV; } | sha256sum | cut -d' ' -f1)
if [ "$(cat .venv/.installed 2>/dev/null)" = "$key" ]; then exit 0; fi
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { say "$python is too old: give PYTHON=<python 3.10 or newer>, 3.11 is what we test"; exit 2; }
say "installing into .venv with $("$python" -V)"

if [ "${keep:-0}" = 1 ]; then
    site=$("$python" -c 'import pathlib, torch; print(pathlib.Path(torch.__file__).parents[1])') \
        || { say "KEEP_TORCH=1, but $python has no torch: give PYTHON=<the interpreter that has it>"; exit 2; }
    [ -x .venv/bin/python ] || "$python" -m venv --system-site-packages .venv
    grep -Ev '^(torch|torchvision)\b' constraints.txt > .venv/constraints.txt
    "$python" - >> .venv/constraints.txt <<'PY'
from importlib import metadata
for name in ('torch', 'torchvision'):
    try: print(f'{name}=={metadata.version(name)}')
    except metadata.PackageNotFoundError: pass
PY
    .venv/bin/python -c 'import torch' 2>/dev/null || echo "$site" > "$(.venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/kept_torch.pth"
else
    [ -x .venv/bin/python ] || "$python" -m venv .venv
    cp constraints.txt .venv/constraints.txt
fi

pip=".venv/bin/python -m pip --disable-pip-version-check"
$pip install --quiet ${PIP_INSTALL_ARGS:-} "setuptools>=69" wheel
$pip install --quiet ${PIP_INSTALL_ARGS:-} --no-build-isolation -c .venv/constraints.txt -e ".[$extras]"
case ",$extras," in *,dev,*) for tool in nbdev ruff; do        # a shared one has no command in .venv/bin
    ls .venv/bin/$tool* >/dev/null 2>&1 || $pip install --quiet ${PIP_INSTALL_ARGS:-} --ignore-installed --no-deps -c .venv/constraints.txt $tool
done;; esac
purelib=$(.venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
cp collectionlora/_compat.py "$purelib/_cpu_torchvision_hook.py"   # for programs that start without us, such as accelerate launch
echo 'import _cpu_torchvision_hook' > "$purelib/_cpu_torchvision_hook.pth"
printf 'PYTHON=%s\nKEEP_TORCH=%s\nEXTRAS=%s\n' "$python" "${keep:-0}" "$extras" > .venv/.choices
echo "$key" > .venv/.installed
say "installed; torch $(.venv/bin/python -c 'import torch; print(torch.__version__)')"
