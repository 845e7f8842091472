"Install `sam_explained`. Every fact about the package is read from settings.ini, the file nbdev reads too."
from configparser import ConfigParser
from pathlib import Path
from setuptools import find_packages, setup

config = ConfigParser(delimiters=['='], interpolation=None)
config.read('settings.ini', encoding='utf-8')
facts = config['DEFAULT']

setup(
    name=facts['lib_name'], version=facts['version'], description=facts['description'],
    long_description=Path('README.md').read_text(encoding='utf-8'), long_description_content_type='text/markdown',
    license='Apache-2.0', url=facts['git_url'].replace('%(user)s', facts['user']).replace('%(repo)s', facts['repo']),
    author=facts['author'], author_email=facts['author_email'], keywords=facts['keywords'].split(),
    packages=find_packages(include=['sam_explained*']), python_requires='>=' + facts['min_python'],
    install_requires=facts['requirements'].split(), extras_require={'dev': facts['dev_requirements'].split(), 'bench': facts['bench_requirements'].split()},
    entry_points={'nbdev': ['sam_explained=sam_explained._modidx:d'], 'console_scripts': facts['console_scripts'].split()},
)
