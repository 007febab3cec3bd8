"""How code looks on the site, on light and on dark pages. Every colour has a contrast of at least 4.5 to 1."""

from pygments.style import Style
from pygments.token import Comment, Generic, Keyword, Name, Number, Operator, String, Token


def _styles(text: str, comment: str, keyword: str, string: str, number: str, name: str, builtin: str) -> dict:
    return {Token: text, Comment: comment, Keyword: keyword, Operator.Word: keyword, Keyword.Constant: number,
            String: string, String.Doc: comment, String.Interpol: text, Number: number, Name.Function: f"bold {name}",
            Name.Class: f"bold {name}", Name.Decorator: builtin, Name.Builtin: builtin, Name.Builtin.Pseudo: text,
            Name.Exception: builtin, Generic.Error: number}


class Light(Style):
    """Dark letters on a nearly white ground."""

    background_color = "#f5f7f9"
    styles = _styles(text="#1f2328", comment="#5c6570", keyword="#0550ae", string="#116329", number="#953800",
                     name="#00588a", builtin="#6639a6")


class Dark(Style):
    """Light letters on a nearly black ground."""

    background_color = "#1b1e22"
    styles = _styles(text="#dadde1", comment="#9aa4af", keyword="#7cc4ee", string="#a5d297", number="#f2b679",
                     name="#f0d58c", builtin="#cbb6f7")
