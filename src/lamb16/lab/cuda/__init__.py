"""What torch.compile makes of the step on CUDA, generated, compiled and inspected on machines without a GPU.

- ``fake.py`` makes torch and Triton believe in a GPU and returns the code that Inductor generates;
- ``kernels.py`` reads that code: the Triton kernels, what they need as cubins of an architecture, and running them, in
  Triton's interpreter or on paper;
- ``sass.py`` counts what a thread executes of a cubin's machine code, by the pipe that executes it;
- ``report.py`` counts what a step over a list of shapes launches, reads, writes and executes;
- ``gpus.py`` has the figures of GPUs, and the time that they would take for that;
- ``published.py`` applies the same to kernels whose time on a GPU is published, as a check.

The first two reach into the internals of torch and Triton, and are what a new version of these can break.
"""
