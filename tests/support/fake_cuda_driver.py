"""A CUDA driver without a GPU, as much of one as fake tensors and a backward pass over them ask for.

It replaces what torch asks about CUDA, in a build for CUDA and in one for CPUs alike, if it is loaded before torch is
imported. Nothing here imports torch.
"""

import ctypes
import hashlib
import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

SOURCE = """
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

namespace at {
struct Driver : CUDAHooksInterface {
  Driver(CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return false; }
  long versionCuDNN() const override { return 0; }
  long versionRuntimeCuDNN() const { return 0; }  // not known to every torch
  DeviceIndex deviceCount() const override { return 1; }
  DeviceIndex getCurrentDevice() const override { return 0; }
  Generator getNewGenerator(DeviceIndex) const override { return make_generator<CPUGeneratorImpl>(); }
};
}  // namespace at

namespace {
using namespace c10;

struct Guard : impl::NoOpDeviceGuardImpl<DeviceType::CUDA> {
  const Device device{DeviceType::CUDA, 0};
  const Stream stream{Stream::DEFAULT, device};
  Device exchangeDevice(Device) const override { return device; }
  Device getDevice() const override { return device; }
  Stream getStream(Device) const noexcept override { return stream; }
  Stream getDefaultStream(Device) const override { return stream; }
  Stream exchangeStream(Stream) const noexcept override { return stream; }
  void record(void**, const Stream&, const DeviceIndex, const EventFlag) const override {}
  void block(void*, const Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
};

Registerer<std::string, std::unique_ptr<at::CUDAHooksInterface>, at::CUDAHooksArgs> driver(
    "CUDAHooks", REGISTRY_PREFERRED, at::CUDAHooksRegistry(),
    [](at::CUDAHooksArgs given) -> std::unique_ptr<at::CUDAHooksInterface> {
      return std::make_unique<at::Driver>(given);
    });
}  // namespace

extern "C" void use_guard() {
  impl::device_guard_impl_registry[static_cast<size_t>(DeviceType::CUDA)].store(new Guard());
}
"""


def compiler() -> str | None:
    """A C++ compiler, if there is one."""
    return next((path for name in ("g++", "c++", "clang++") if (path := shutil.which(name))), None)


def build() -> Path:
    """The library, compiled once for each torch on a machine: some ten seconds."""
    root = Path(importlib.util.find_spec("torch").origin).parent
    command = [compiler(), "-shared", "-fPIC", "-std=c++20", "-D_GLIBCXX_USE_CXX11_ABI=1", f"-I{root / 'include'}"]
    command += [f"-L{root / 'lib'}", f"-Wl,-rpath,{root / 'lib'}"]
    made_of = f"{SOURCE} {command} {importlib.metadata.version('torch')}"
    home = Path(tempfile.gettempdir()) / f"evenstep-tests-{os.getuid()}"
    home.mkdir(mode=0o700, exist_ok=True)
    library = home / f"fake_cuda_{hashlib.sha256(made_of.encode()).hexdigest()[:16]}.so"
    if not library.exists():
        with tempfile.TemporaryDirectory(dir=home) as work:
            source, built = Path(work, "driver.cpp"), Path(work, "driver.so")
            source.write_text(SOURCE)
            command += [str(source), "-o", str(built), "-lc10", "-ltorch_cpu"]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"the stand-in for a CUDA driver does not compile:\n{done.stderr[-4000:]}")
            built.replace(library)  # atomic: another process may have built it too
    return library


def load() -> ctypes.CDLL:
    """Answer for CUDA from here on; ``use_guard()`` of what is returned, once torch is imported, completes it."""
    return ctypes.CDLL(str(build()))
