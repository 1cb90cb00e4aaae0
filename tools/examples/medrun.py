"""medrun from Python: a binding by ctypes, which needs nothing but the shared library (make lib).

    from medrun import Model
    for piece in Model("demo.mdr").ask("What are the symptoms of diabetes?"):
        print(piece, end="", flush=True)
"""
import ctypes
import os
import sys

# An installed library, or the one that MEDRUN_LIBRARY names. The name carries the version of the
# structs that follow.
lib = ctypes.CDLL(os.environ.get("MEDRUN_LIBRARY", "libmedrun.so.0.1"))
lib.medrun_is_stop.restype = ctypes.c_bool


class Error(ctypes.Structure):
    _fields_ = [("code", ctypes.c_int), ("text", ctypes.c_char * 512)]


def call(name, *arguments):
    """Calls a function that returns a code and describes what is wrong in its last argument."""
    error = Error()
    if getattr(lib, name)(*arguments, ctypes.byref(error)):
        raise RuntimeError(error.text.decode(errors="replace"))


class Model:
    def __init__(self, path):
        self.handle, self.session = ctypes.c_void_p(), ctypes.c_void_p()
        call("medrun_open", ctypes.byref(self.handle), os.fsencode(path), None)
        call("medrun_start", ctypes.byref(self.session), self.handle, None, None,
             ctypes.c_size_t(0))

    def __del__(self):
        lib.medrun_stop(self.session)
        lib.medrun_close(self.handle)

    def ask(self, question):
        """Yields the answer, piece by piece. A second question goes on with the conversation."""
        data, text, n = question.encode(), ctypes.c_char_p(), ctypes.c_size_t()
        token = ctypes.c_int32()
        call("medrun_say", self.session, b"user", data, ctypes.c_size_t(len(data)))
        while True:
            call("medrun_next", self.session, ctypes.byref(token), ctypes.byref(text),
                 ctypes.byref(n))
            yield ctypes.string_at(text, n.value).decode(errors="replace")
            if lib.medrun_is_stop(self.handle, token):
                return


if __name__ == "__main__":
    for piece in Model(sys.argv[1]).ask(sys.argv[2]):
        print(piece, end="", flush=True)
    print()
