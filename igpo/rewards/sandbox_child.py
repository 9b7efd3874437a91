"""Runs one program in the process it is started in, after giving up what the program must not have.

Started by sandbox.py as a file (`python -I -B sandbox_child.py IN OUT`), so it imports the standard library only. IN is
a file descriptor with a JSON request, OUT one to which a line with the request's token goes for every test that passes.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
import resource
import struct
import sys
import types

# x86-64 system calls (linux/arch/x86/entry/syscalls/syscall_64.tbl)
_REFUSED = (
    (41, 42, 49, 50),  # socket, connect, bind, listen: no network
    (57, 58, 59, 322),  # fork, vfork, execve, execveat: no other process
    (62, 200, 234, 101, 310, 311, 424, 434, 438),  # kill, ptrace, process_vm_*, pidfd_*: none of theirs either
    (85, 87, 263, 82, 264, 316, 83, 258, 84, 86, 265, 88, 266, 133, 259),  # names in the file system
    (90, 91, 268, 452, 92, 93, 94, 260, 76, 132, 235, 261, 280, 188, 189, 190, 197, 198, 199),  # their attributes
    (160, 302, 109, 112, 203),  # setrlimit, prlimit64, setpgid, setsid, sched_setaffinity
    (29, 64, 68, 240, 319, 248, 249, 250),  # memory that outlives a process: shm, sem, msg, mq, memfd, keys
    (165, 166, 155, 161, 272, 308, 169, 167, 246, 175, 313, 321, 298, 323),  # mounts, namespaces, kernel
)  # fmt: skip
_ABSENT = (
    435,
    425,
    426,
    427,
    437,
)  # clone3, io_uring_*, openat2: pointers a filter cannot look behind
_OPENS = ((2, 24), (257, 32))  # open, openat: offset of their flags in seccomp_data
_CLONE, _CLONE_FLAGS, _CLONE_THREAD = 56, 16, 0x10000
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_ARCH, _X32 = 0xC000003E, 0x40000000  # AUDIT_ARCH_X86_64; numbers of the x32 ABI start here
_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06  # BPF instructions
_ALLOW, _ERRNO, _KILL = 0x7FFF0000, 0x00050000, 0x80000000
_PR_SET_PDEATHSIG, _PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS, _FILTER_MODE = 1, 22, 38, 2
_SIGKILL = 9


def _rule(code: int, value: int, yes: int = 0, no: int = 0) -> bytes:
    return struct.pack("HBBI", code, yes, no, value)


def _program() -> bytes:
    """The filter: refused calls fail with EPERM, opening a file for writing with EACCES."""
    refuse = [_rule(_RETURN, _ERRNO | errno.EPERM)]
    rules = [
        _rule(_LOAD, 4), _rule(_EQUAL, _ARCH, 1), _rule(_RETURN, _KILL),
        _rule(_LOAD, 0), _rule(_AT_LEAST, _X32, 0, 1), _rule(_RETURN, _KILL),
    ]  # fmt: skip
    for number in (n for group in _REFUSED for n in group):
        rules += [_rule(_EQUAL, number, 0, 1), *refuse]
    for number in _ABSENT:
        rules += [_rule(_EQUAL, number, 0, 1), _rule(_RETURN, _ERRNO | errno.ENOSYS)]
    for number, offset in _OPENS:
        rules += [
            _rule(_EQUAL, number, 0, 4), _rule(_LOAD, offset), _rule(_ANY_BIT, _WRITING, 0, 1),
            _rule(_RETURN, _ERRNO | errno.EACCES), _rule(_RETURN, _ALLOW),
        ]  # fmt: skip
    rules += [
        _rule(_EQUAL, _CLONE, 0, 3), _rule(_LOAD, _CLONE_FLAGS), _rule(_ANY_BIT, _CLONE_THREAD, 1),
        *refuse, _rule(_RETURN, _ALLOW),
    ]  # fmt: skip
    return b"".join(rules)


class _Filter(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("rules", ctypes.c_char_p))


def confine(cpu_seconds: int, memory_bytes: int, output_bytes: int) -> None:
    """Sets the limits of this process for good. Raises OSError where the kernel has no seccomp filters."""
    libc = ctypes.CDLL(None, use_errno=True)
    for limit, value in (
        (resource.RLIMIT_CPU, cpu_seconds), (resource.RLIMIT_AS, memory_bytes), (resource.RLIMIT_FSIZE, output_bytes),
        (resource.RLIMIT_NOFILE, 64), (resource.RLIMIT_CORE, 0),
    ):  # fmt: skip
        resource.setrlimit(limit, (value, value))
    program = _program()
    filter_ = _Filter(len(program) // 8, program)
    for arguments in (
        (_PR_SET_PDEATHSIG, _SIGKILL, 0, 0, 0),
        (_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0),
        (_PR_SET_SECCOMP, _FILTER_MODE, ctypes.byref(filter_), 0, 0),
    ):
        if libc.prctl(*arguments):
            code = ctypes.get_errno()
            raise OSError(code, f"prctl: {os.strerror(code)}")


def main() -> None:
    source, sink = int(sys.argv[1]), int(sys.argv[2])
    with os.fdopen(source, encoding="utf-8") as stream:
        request = json.load(stream)
    confine(request["cpu_seconds"], request["memory_bytes"], request["output_bytes"])
    os.write(sink, b"ready\n")
    tests, token = request["tests"], request["token"]
    namespace = {"__name__": "__main__", "__builtins__": __builtins__}
    _run(request["program"], "program", namespace)
    for test in tests or ("",):
        # a program may raise anything; that is a test it does not pass
        with contextlib.suppress(Exception):
            _run(test, "test", namespace)
            os.write(sink, f"{token}\n".encode())


def _run(text: str, name: str, namespace: dict[str, object]) -> None:
    types.FunctionType(compile(text, name, "exec"), namespace)()


if __name__ == "__main__":
    main()
