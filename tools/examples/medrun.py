"""medrun from Python, by ctypes: nothing but the shared library is needed (make lib).

    from medrun import Model
    with Model("demo.mdr", temperature=0.4, seed=1) as model:
        for piece in model.ask("What is gout?"):
            print(piece, end="", flush=True)
"""
import ctypes as c
import os
import sys

# What MEDRUN_LIBRARY names, the library beside this file, that of `make lib`, or an installed one.
NAME = "libmedrun.so.0.1"                       # 0.1 is the version of the structs below
PLACES = [os.path.join(os.path.dirname(__file__), d, NAME) for d in (".", "../../build/lib")]
lib = c.CDLL(os.environ.get("MEDRUN_LIBRARY") or next(filter(os.path.exists, PLACES), NAME))
size = c.c_size_t
lib.medrun_is_stop.restype, lib.medrun_logits.restype = c.c_bool, c.POINTER(c.c_float)


def struct(*fields):
    """A struct of (type, names): the fields of one in section 1 of medrun.c, in the same order."""
    fields = [(name, kind) for kind, names in fields for name in names.split()]
    return type("struct", (c.Structure,), {"_fields_": fields})


Error = struct((c.c_int, "code"), (c.c_char * 512, "text"))
ModelOptions = struct((c.c_int, "threads"), (c.c_char_p, "kernels"), (c.c_bool, "load"))
Sampling = struct((c.c_float, "temperature"), (c.c_int, "top_k"),
                  (c.c_float, "top_p min_p repeat_penalty"), (c.c_uint64, "seed"))
Info = struct((c.c_char_p, "name architecture type chat_template system kernels licence notice"),
              (c.c_int, "vocab_size hidden_size n_layers n_heads n_kv_heads head_dim ffn_size "
               "max_positions threads bos n_stops"), (c.c_int * 8, "stops"),
              (c.c_uint64, "parameters file_bytes weight_bytes"), (Sampling, "sampling"),
              (c.c_uint8 * 32, "hash"), (c.c_char_p, "device device_log"))
Chat = struct((c.c_char_p, "date"), (c.c_bool, "think"), (c.c_int, "bos"), (c.c_char_p, "tools"),
              (size, "n_tools"))
Options = struct((c.c_int, "context batch logit_rows lookup kv"), (c.c_bool, "strict custom"),
                 (Sampling, "sampling"), (Chat, "chat"), (c.c_void_p, "draft template_name"))


def call(name, *arguments):
    """Calls a function that returns a code and says what went wrong in its last argument."""
    error = Error(text=b"the model is closed")
    if not arguments[0] or getattr(lib, name)(*arguments, c.byref(error)):
        raise RuntimeError(error.text.decode(errors="replace"))


class Model:
    """A checkpoint and one conversation with it. Sampling is the card's, but for what you name."""
    def __init__(self, path, context=0, threads=0, **sampling):
        self.model, self.session, self.info = c.c_void_p(), c.c_void_p(), Info()
        call("medrun_open", c.byref(self.model), os.fsencode(path), c.byref(ModelOptions(threads)))
        lib.medrun_describe(self.model, c.byref(self.info))
        o = Options(context=context, custom=True, sampling=self.info.sampling)
        for name, value in sampling.items():
            setattr(o.sampling, name, type(getattr(o.sampling, name))(value))
        call("medrun_start", c.byref(self.session), self.model, c.byref(o), None, size(0))

    def ask(self, question):
        """Yields the answer, piece by piece. A second question continues the conversation."""
        data, text, n, token, ended = question.encode(), c.c_char_p(), size(), c.c_int32(), False
        call("medrun_say", self.session, b"user", data, size(len(data)))
        while not ended:
            call("medrun_next", self.session, c.byref(token), c.byref(text), c.byref(n))
            ended = lib.medrun_is_stop(self.model, token)
            yield c.string_at(text, n.value).decode(errors="replace")

    def logits(self, text):
        """What may follow TEXT: vocab_size numbers. The conversation is forgotten."""
        data, n, add_bos = text.encode(), size(), 1
        ids, cap = (c.c_int32 * (len(data) + 2))(), size(len(data) + 2)
        call("medrun_tokenize", self.model, data, size(len(data)), add_bos, ids, cap, c.byref(n))
        call("medrun_rewind", self.session, size(0))
        call("medrun_feed", self.session, ids, n)
        while lib.medrun_pending(self.session):
            call("medrun_step", c.byref(self.session), size(1))
        return lib.medrun_logits(self.session, size(0))[:self.info.vocab_size]

    def close(self):
        lib.medrun_stop(self.session), lib.medrun_close(self.model)
        self.session, self.model = c.c_void_p(), c.c_void_p()

    __del__, __enter__, __exit__ = close, lambda self: self, lambda self, *_: self.close()


if __name__ == "__main__":
    len(sys.argv) == 3 or sys.exit("usage: python3 medrun.py MODEL.mdr QUESTION")
    for part in Model(sys.argv[1]).ask(sys.argv[2]):
        print(part, end="", flush=True)
    print()
