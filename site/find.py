"Names for Sphinx' search: each function and class where the book documents it, each argument on the pages that take it."
from docutils import nodes
from sphinx.domains import Domain, ObjType
from sphinx.transforms import SphinxTransform
from book import page, present


def entries(document):
    "The sections that hold build.py's API entries."
    for section in document.findall(nodes.section):
        below = next((o for o in section[1:] if isinstance(o, nodes.raw)), None)
        if isinstance(section[0][0], nodes.literal) and below and 'class="api"' in below.astext(): yield section


class Anchors(SphinxTransform):
    "An entry's anchor is its name in small letters, as nbdev writes links; another section of that anchor gives way."
    default_priority = 400
    def apply(self):
        taken = {}
        for o in entries(self.document): taken.setdefault(o[0].astext().lower(), o)
        for o in self.document.findall(nodes.section):
            own = [name for name, section in taken.items() if section is o]
            o['ids'] = own + [f'{i}-section' if i in taken and i not in own else i for i in o['ids'] if i not in own]


class Names(Domain):
    "What build.py's API entries document. The search shows a name with its kind and its page."
    name, label, data_version = 'book', 'Book', 1
    object_types = {'function': ObjType('function'), 'class': ObjType('class'), 'argument': ObjType('argument')}
    initial_data = {'objects': {}}

    def get_type_name(self, type, primary=False): return type.lname

    def clear_doc(self, docname): self.data['objects'].pop(docname, None)

    def merge_domaindata(self, docnames, otherdata):
        for o in docnames: self.data['objects'][o] = otherdata['objects'].get(o, {})

    def process_doc(self, env, docname, document):
        found = self.data['objects'][docname] = {}
        for section in entries(document):
            name, anchor = section[0].astext(), section['ids'][0]
            found[name] = 'class' if name.split('.')[-1][0].isupper() else 'function', anchor
            rows = [o for table in section.findall(nodes.table) if 'Argument' in table[0].astext() for o in table.findall(nodes.row)]
            for argument in [o[0].astext() for o in rows if any(o[0].findall(nodes.literal))]:
                if '*' not in argument: found.setdefault(argument, ('argument', anchor))

    def get_objects(self):
        order = {page(o): i for i, o in enumerate(present())}
        for docname, found in self.data['objects'].items():
            for name, (kind, anchor) in found.items():
                yield name, name, kind, docname, anchor, order.get(docname, 0) + 1000 * (kind == 'argument')
