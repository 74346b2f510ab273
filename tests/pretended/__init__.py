"""A pretended CUDA device for a torch that has none: the real code, real numbers, tensors that say "cuda:0".

    python -m tests.pretended wikitext_gpt2/analyze.py --preset demo --use_half_precision      # any script, any flags
    python -m pytest -p tests.pretended.plugin tests/test_gpu.py -k "not compiled"             # tests that want a GPU

A CudaTensor (device.py) says that it is on the GPU and keeps its values in a tensor of the CPU. Each operation is
looked at as CUDA would (rules.py: devices that don't go together, dtypes without a kernel, and FakeTensorMode's
opinion), then computed on the CPU; where the host would wait for the device is noted. The first use compiles guard.cpp
with $CXX or g++. That library has to be loaded before torch is, so all of this happens in processes of its own, which
tests/test_pretended_cuda.py starts; and torch has to be one that was built without CUDA.

What it can't see: torch.compile; the order of streams, and who reads a pinned copy too early; fragments and peaks of
the allocator; speed; NCCL but for the tensors that it is handed; which attention kernel is taken (here the plain
products); what else a CUDA kernel refuses, or rounds otherwise than the CPU's.
"""
