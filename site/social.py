"Draw site/_static/social.png, what a link to the book shows elsewhere: the first page's valley and its two walks."
from io import BytesIO
import matplotlib
matplotlib.use('Agg')
import matplotlib.pyplot as plt
from PIL import Image
from book import root, website
from sam_explained.landscape import TwoMinima, contours, descend, show_path


def draw():
    "The figure, 1200 by 630 pixels."
    fig = plt.figure(figsize=(12, 6.3), dpi=100, facecolor='#fdfcf9', layout='none')
    ax, loss = fig.add_axes([0, 0, 1, .66]), TwoMinima()
    contours(loss, ylim=(-.62, .62), ax=ax)
    for o in fig.axes[1:]: o.remove()                            # the colour bar
    ax.set_position([0, 0, 1, .66])
    ax.axis('off')
    for method, rho in (('SGD', 0.), ('SAM', .2)): show_path(descend(loss, (-1.3, .25), rho=rho, steps=600), ax, method)
    for line in ax.lines: line.set(lw=2.6, ms=15)
    for text, y, size, color in ((website['title'], .84, 50, '#24262b'), (website['description'], .735, 17, '#565a62')):
        fig.text(.05, y, text, size=size, color=color, family='DejaVu Serif')
    return fig


if __name__ == '__main__':
    drawn, target = BytesIO(), root/'site/_static/social.png'
    draw().savefig(drawn, format='png', dpi=100)
    Image.open(drawn).convert('RGB').quantize(128).save(target, optimize=True)
    print(f'{target.relative_to(root)}: {target.stat().st_size // 1000} KB')
