#!/bin/sh
# llama.cpp and its converter, for the tests beside this file: sh tests/llamacpp/environment.sh DIRECTORY
#
# No wheel of `llama-cpp-python` is on the package index. Its source archive holds llama.cpp's, of which only the
# converter is taken here: Python, nothing is compiled. `xllamacpp` is llama.cpp with its server as a wheel, for CPUs.
# --no-deps: what the converter imports beside sentencepiece, the project's own environment has.
set -eu
directory=${1:?usage: environment.sh DIRECTORY}
python=${PYTHON:-python3}
source=llama_cpp_python-0.3.36
test -e "$directory/.ready" && exit 0
mkdir -p "$directory"
"$python" -m pip install --quiet --no-deps --target "$directory/packages" xllamacpp==2026.10.11549 sentencepiece==0.2.3
"$python" -m pip download --quiet --no-deps --no-binary llama-cpp-python --dest "$directory" llama-cpp-python==0.3.36
tar -xzf "$directory/$source.tar.gz" -C "$directory" "$source/vendor/llama.cpp"
mv "$directory/$source/vendor/llama.cpp" "$directory/llama.cpp"
rm -r "$directory/$source" "$directory/$source.tar.gz"
touch "$directory/.ready"
