"""Serve a GGUF file by llama.cpp's own server until stdin ends: its address is the first line of stdout.

As ``llama-server --threads 1 --ctx-size 256 --flash-attn off --cache-type-k f32 --cache-type-v f32`` would.
"""

import sys

import xllamacpp as llama

# By default keys and values are float16, and its flash attention on a CPU rounds to 16 bits, which turns near ties.
exact, plain = llama.ggml_type.GGML_TYPE_F32, llama.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
options = {"n_ctx": 256, "n_parallel": 1, "warmup": False, "verbosity": 0, "flash_attn_type": plain}
settings = llama.CommonParams()
settings.model.path = sys.argv[1]
for name, value in {**options, "cache_type_k": exact, "cache_type_v": exact}.items():
    setattr(settings, name, value)
for threads in (settings.cpuparams, settings.cpuparams_batch):
    setattr(threads, "n_threads", 1)  # noqa: B010
server = llama.Server(settings)  # it serves as long as this object is there
print(server.listening_address, flush=True)
sys.stdin.read()
