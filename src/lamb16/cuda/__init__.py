"""What torch.compile makes of the step on CUDA, generated, compiled and inspected on machines without a GPU.

- ``fake.py`` makes torch and Triton believe in a GPU and returns the code that Inductor generates;
- ``kernels.py`` reads that code: the Triton kernels, what they need as cubins of an architecture, and running them, in
  Triton's interpreter or on paper;
- ``report.py`` counts what a step over a list of shapes launches, reads and writes;
- ``copying.py`` is no part of this: the kernel that copies packed tensors on a GPU.

The first two reach into the internals of torch and Triton, and are what a new version of these can break.
"""
