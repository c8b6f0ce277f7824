from _typeshed import ReadableBuffer

from ulnet.stack.layers import Arp as Arp
from ulnet.stack.layers import Ethernet as Ethernet
from ulnet.stack.layers import Frame as Frame
from ulnet.stack.layers import Icmp as Icmp
from ulnet.stack.layers import IcmpError as IcmpError
from ulnet.stack.layers import Ipv4 as Ipv4
from ulnet.stack.layers import Tcp as Tcp
from ulnet.stack.layers import Udp as Udp

def parse_frame(data: ReadableBuffer, verify: bool = True) -> Frame: ...
