"""Errors that are a user's to mend: one line that says what and why."""

from typing import NoReturn


class Refusal(Exception):
    """`brief` is the message without the name of what refused, for a command line that has said that already."""

    place = ""

    @property
    def brief(self) -> str:
        return str(self).removeprefix(self.place)


class ValueRefused(Refusal, ValueError):
    pass


class TypeRefused(Refusal, TypeError):
    pass


class Missing(Refusal, ImportError):
    """A package that the base install does not bring."""

    def __init__(self, package: str, what: str) -> None:
        super().__init__(
            f'{what} needs {package}: pip install {package}; or in the clone, for all of them: pip install --no-build-isolation -e ".[images]"'
        )


KINDS = {ValueError: ValueRefused, TypeError: TypeRefused}


def refuse(kind: type[ValueError] | type[TypeError], place: str, text: str) -> NoReturn:
    """Raises kind, as a Refusal; place: what refuses."""
    error = KINDS[kind](place + text)
    error.place = place
    raise error
