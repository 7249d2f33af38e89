from forkd.config.options import Needs
from forkd.config.plain import to_plain


class D:
    def __init__(s, k, n):
        s.k = k
        s.needs = n

    def __str__(s):
        return s.k


def differences(a, b):
    x, y = to_plain(a), to_plain(b)
    return [D(k, Needs.RESTART if k == "name" else Needs.RELOAD) for k in {**x, **y} if x.get(k) != y.get(k)]
