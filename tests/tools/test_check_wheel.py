"""check_wheel accepts a wheel of libraries as ours are, and catches each way to be another one."""

import re
import shutil
import subprocess
import zipfile

import pytest

MANYLINUX = "kalmanet-0.1.0-py3-none-manylinux_2_39_x86_64.whl"
# Of PyTorch's stable C functions, one of 2.11 and one that any release has.
GOOD = """
extern "C" {
int torch_dtype_float8_e8m0fnu(void);
int aoti_torch_get_dim(void*, long*);
int touch(void* t, long* n) { return torch_dtype_float8_e8m0fnu() + aoti_torch_get_dim(t, n); }
}
"""


@pytest.fixture(scope="module")
def tool(load_tool):
    return load_tool("check_wheel")


@pytest.fixture
def findings(tool, tmp_path):
    compiler = shutil.which("c++")
    assert compiler, "no C++ compiler; run tools/setup"

    def build(source, name, *flags):
        (tmp_path / "source.cpp").write_text(source)
        library = tmp_path / name
        subprocess.run(
            [compiler, "-shared", "-fPIC", tmp_path / "source.cpp", "-o", library, *flags],
            check=True,
        )
        return library

    def make(torch=GOOD, jax="int touch() { return 1; }", name=MANYLINUX, more=(), links=()):
        # A library that is there to be linked, as PyTorch's are in the real one.
        for each in ("torch_cpu", *links):
            build("int nothing() { return 0; }", f"lib{each}.so", f"-Wl,-soname,lib{each}.so")
        flags = [
            "-L",
            str(tmp_path),
            "-Wl,--no-as-needed",
            *(f"-l{e}" for e in ("torch_cpu", *links)),
        ]
        wheel = tmp_path / name
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.write(build(torch, "libkalmanet_torch.so", *flags), tool.TORCH)
            archive.write(build(jax, "libkalmanet_jax.so"), tool.JAX)
            archive.writestr("kalmanet/py.typed", "")
            archive.writestr(
                "kalmanet-0.1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n"
            )
            for extra in more:
                archive.write(tmp_path / "libtorch_cpu.so", extra)
            names = [*archive.namelist(), "kalmanet-0.1.0.dist-info/RECORD"]
            archive.writestr(names[-1], "".join(f"{name},,\n" for name in names))
        return tool.check(wheel)

    return make


def test_a_wheel_as_ours_passes(findings):
    assert findings() == []


@pytest.mark.parametrize("name", [
    "kalmanet-0.1.0-cp311-cp311-manylinux_2_39_x86_64.whl",
    "kalmanet-0.1.0-py3-none-linux_x86_64.whl",
])  # fmt: skip
def test_a_tag_of_one_python_or_machine(findings, name):
    (found,) = findings(name=name)
    assert "not tagged py3-none-manylinux_*" in found


def test_a_manylinux_older_than_the_symbols(findings):
    modern = "#include <cstdlib>\nunsigned f() { return arc4random(); }"  # glibc 2.36
    if subprocess.run(["ldd", "--version"], capture_output=True, text=True).stdout < "ldd (2.36":
        modern = "#include <pthread.h>\nvoid f(void* p) { pthread_exit(p); }"
    found = findings(jax=modern, name="kalmanet-0.1.0-py3-none-manylinux_2_5_x86_64.whl")
    assert any("its libraries need manylinux" in line for line in found), found


def test_a_library_of_somebody_else_inside(findings):
    (found,) = findings(more=["kalmanet.libs/libgomp-1234.so.1"])
    assert "libgomp-1234.so.1" in found


def test_a_library_that_no_machine_has(findings):
    found = findings(links=["openblas"])
    assert "kalmanet/libkalmanet_torch.so links libopenblas.so" in found, found


def test_pytorch_s_library_for_jax_alone(tool, tmp_path, findings):
    findings()  # leaves libtorch_cpu.so there
    source, library = tmp_path / "j.cpp", tmp_path / "j.so"
    source.write_text("int touch() { return 1; }")
    subprocess.run(["c++", "-shared", "-fPIC", source, "-o", library, "-L", tmp_path,
                    "-Wl,--no-as-needed", "-ltorch_cpu"], check=True)  # fmt: skip
    assert tool.check_links(library, tool.JAX) == [f"{tool.JAX} links libtorch_cpu.so"]
    assert tool.check_links(library, tool.TORCH) == []


def test_python_s_own_symbols(findings):
    source = GOOD + 'extern "C" void* PyList_New(long); void* f() { return PyList_New(0); }'
    assert any("symbols of Python: PyList_New" in line for line in findings(torch=source))


def test_pytorch_s_cpp_interface(findings):
    source = GOOD + "namespace at { struct Tensor { void zero_(); }; }\n"
    source += "namespace c10 { struct TensorImpl { void release_resources(); }; }\n"
    source += "void f(c10::TensorImpl& t, at::Tensor& a) { t.release_resources(); a.zero_(); }"
    found = findings(torch=source)
    assert any("leaves PyTorch's stable ABI" in line for line in found), found


def test_a_newer_pytorch_than_promised(findings):
    source = GOOD + 'extern "C" int torch_future_shim_of_a_later_release(void);\n'
    source += "int f() { return torch_future_shim_of_a_later_release(); }"
    found = findings(torch=source)
    assert found, "an unknown function of PyTorch passed"


def test_an_older_pytorch_than_promised(findings):
    source = 'extern "C" int aoti_torch_get_dim(void*, long*);\n'
    source += "int f(void* t, long* n) { return aoti_torch_get_dim(t, n); }"
    assert any("promised is (2, 11)" in line for line in findings(torch=source))


def test_nothing_of_pytorch(findings):
    (found,) = findings(torch="int f() { return 0; }")
    assert "uses nothing of PyTorch" in found


def test_the_oldest_release_is_the_package_s(tool, root):
    text = (root / "python" / "kalmanet" / "_library.py").read_text()
    assert re.search(r"OLDEST_TORCH = \((\d+), (\d+)\)", text).groups() == tuple(
        str(n) for n in tool.OLDEST
    )
