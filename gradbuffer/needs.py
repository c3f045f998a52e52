"""Which option needs which: an option that has no effect beside the others is refused, never ignored.

A table of needs has rows (options, needed, values): the options, names with spaces between, have an effect only where the option
`needed` has one of these values. `ON` stands for all values but those that switch an option off; a range (0, end) for the numbers
below its end, and for an option that is off.
"""

__all__ = ["ON", "refuse_without_effect"]

ON = "on"
OFF = (None, False, 0, [0])


def refuse_without_effect(needs, options, given, spell=str):
    """Raise where an option was given that has no effect.

    Args:
        needs: a table as above.
        options: dict from name to value, of all options; one that is not there counts as None.
        given: the names of those that were given.
        spell: function from an option's name to what users call it.

    Raises:
        ValueError: names the option, what it needs, and what that is.
    """
    for names, needed, values in needs:
        value = options.get(needed)
        if values == ON:
            effect, reason = value not in OFF, f"needs {spell(needed)}"
        elif values == (None,):
            effect, reason = value is None, f"has no effect with {spell(needed)} {value}"
        elif isinstance(values, range):
            effect, reason = value in OFF or value < values.stop, f"has no effect with {spell(needed)} {value}"
        else:
            wanted = " or ".join(f"{spell(needed)} {some}" for some in values).replace(" True", "")
            effect, reason = value in values, f"is for {wanted}, got {spell(needed)} {value}"
        for name in names.split():
            if name in given and not effect:
                raise ValueError(f"{spell(name)} {reason}")
