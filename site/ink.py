"Four quiet inks for code, on paper and at night."
from pygments.style import Style
from pygments.token import Comment, Keyword, Name, Number, Operator, String


def inks(plain, keyword, string, comment, name):
    return {Keyword: keyword, Operator.Word: keyword, String: string, Comment: f'italic {comment}', Number: name,
            Name.Function: name, Name.Class: name, Name.Decorator: name, Name: plain}


class Paper(Style):
    background_color, styles = '#f7f5ef', inks('#24262b', '#8a3b6b', '#3f6b2a', '#69655a', '#24557f')


class Night(Style):
    background_color, styles = '#1c1f25', inks('#dcdad4', '#d9a0c4', '#a9c995', '#9d9a8f', '#9cc4e8')
