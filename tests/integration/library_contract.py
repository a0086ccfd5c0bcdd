"""libkvloom as a program outside this tree sees it: python3 library_contract.py BUILD_DIRECTORY

Installs the library into a fresh directory and checks: it exports exactly what kvloom.h declares; it
has a SONAME; the README's example compiles by pkg-config, by the CMake package, statically and as C++,
and runs against a sidecar; the header alone compiles as C++.
"""
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time

ROOT = os.path.abspath(os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", ".."))


def run(command, **options):
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                          timeout=300, **options)
    if done.returncode != 0:
        raise SystemExit(f"FAILED: {command}\n{done.stdout}")
    return done.stdout


def declared():
    with open(os.path.join(ROOT, "src", "kvloom.h"), encoding="utf-8") as file:
        text = re.sub(r"/\*.*?\*/", "", file.read(), flags=re.S)
    return set(re.findall(r"\b(kvloom_[a-z_]+)\s*\(", text))


def exported(library):
    lines = run(["nm", "-D", "--defined-only", library]).splitlines()
    names = {line.split()[-1].split("@")[0] for line in lines}
    return {name for name in names if not name.startswith("KVLOOM_")}


def example():
    with open(os.path.join(ROOT, "README.md"), encoding="utf-8") as file:
        text = file.read()
    code = re.search(r"<!-- example: begin -->\n```c\n(.*?)```", text, re.S).group(1)
    body = code[code.index("int main"):].strip().split("\n")
    inside = [line for line in body[2:-1] if line.strip()]
    assert len(inside) <= 25, f"the example has {len(inside)} lines"
    return code


def check_programs(place, socket):
    flags = run(["pkg-config", "--cflags", "--libs", "kvloom"]).split()
    static = run(["pkg-config", "--static", "--libs", "kvloom"]).split()
    library = os.path.join(place, "lib")
    source = os.path.join(place, "example.c")
    with open(source, "w", encoding="utf-8") as file:
        file.write(example())
    header_only = os.path.join(place, "header.cpp")
    with open(header_only, "w", encoding="utf-8") as file:
        file.write("#include <kvloom.h>\nint main() { return kvloom_version()[0] == 0; }\n")
    programs = {
        "shared": ["cc", "-std=c11", "-Wall", "-Wextra", "-Werror", source] + flags,
        "static": ["cc", "-std=c11", source] + flags[:1]
        + [os.path.join(library, "libkvloom.a")] + [f for f in static if f != "-lkvloom"],
        "c++": ["c++", "-std=c++11", "-Wall", "-Wextra", "-Wpedantic", "-Werror", header_only] + flags,
    }
    environment = dict(os.environ, LD_LIBRARY_PATH=library)
    for name, command in programs.items():
        program = os.path.join(place, "program-" + name)
        run(command + ["-o", program])
        said = run([program, socket], env=environment)
        if name != "c++":
            assert "layer 1: 1024 bytes, first number 0" in said, said
    needed = run(["readelf", "-d", os.path.join(place, "program-shared")])
    assert "libkvloom.so.0" in needed, needed


def check_cmake(place, socket):
    with open(os.path.join(place, "CMakeLists.txt"), "w", encoding="utf-8") as file:
        file.write("cmake_minimum_required(VERSION 3.22)\nproject(user C)\n"
                   "find_package(KVLoom 0.1 REQUIRED)\nadd_executable(user example.c)\n"
                   "target_link_libraries(user PRIVATE KVLoom::kvloom)\n")
    build = os.path.join(place, "user-build")
    run(["cmake", "-S", place, "-B", build, "-DCMAKE_PREFIX_PATH=" + place])
    run(["cmake", "--build", build])
    assert "layer 1: 1024 bytes" in run([os.path.join(build, "user"), socket])


def start_sidecar(program, place):
    socket = os.path.join(place, "s.sock")
    key = os.path.join(place, "key")
    with open(key, "wb") as file:
        file.write(bytes(range(32)))
    process = subprocess.Popen([program, "sidecar", "--socket", socket, "--key-file", key,
                                "--model", "my-model", "--store", os.path.join(place, "store"),
                                "--disk", "64MiB", "--memory", "64MiB", "--with-parent"])
    for _ in range(500):
        if os.path.exists(socket):
            return process, socket
        time.sleep(0.01)
    raise SystemExit("FAILED: the sidecar does not start")


def main():
    build = os.path.abspath(sys.argv[1])
    if not os.path.exists(os.path.join(build, "libkvloom.so")):
        run(["cmake", "--build", build, "--target", "kvloom_shared", "kvloom_static"])
    place = tempfile.mkdtemp(prefix="kvloom-library-")
    try:
        run(["cmake", "--install", build, "--component", "library", "--prefix", place])
        # Debian's library directory has the architecture in its name.
        found = [folder for folder, _, files in os.walk(place) if "libkvloom.a" in files][0]
        if found != os.path.join(place, "lib"):
            os.makedirs(os.path.join(place, "lib"), exist_ok=True)
            for name in os.listdir(found):
                if name.startswith("libkvloom"):
                    os.symlink(os.path.join(found, name), os.path.join(place, "lib", name))
        os.environ["PKG_CONFIG_PATH"] = os.path.join(found, "pkgconfig")
        pc = os.path.join(found, "pkgconfig", "kvloom.pc")
        with open(pc, encoding="utf-8") as file:
            text = file.read()
        with open(pc, "w", encoding="utf-8") as file:
            file.write(re.sub(r"(?m)^(libdir|includedir|prefix)=(.*)$",
                              lambda m: {"prefix": f"prefix={place}", "libdir": f"libdir={found}",
                                         "includedir": f"includedir={place}/include"}[m.group(1)],
                              text))
        library = os.path.join(found, "libkvloom.so")
        assert declared() == exported(library), declared() ^ exported(library)
        assert "SONAME" in run(["readelf", "-d", library])
        process, socket = start_sidecar(os.path.join(build, "kvloom"), place)
        check_programs(place, socket)
        check_cmake(place, socket)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=10) == 0
        assert not os.path.exists(socket)
    finally:
        shutil.rmtree(place)
    print("library: exports, pkg-config, CMake package, static, C++ and the README's example agree")


if __name__ == "__main__":
    main()
