// What Gloo does with a message whose place and length add up to more than an
// integer holds: prints "written" if the peer has changed memory before the
// buffer, "refused" if the connection was given up.
#include <arpa/inet.h>
#include <sys/socket.h>
#include <unistd.h>

#include <cstring>
#include <iostream>
#include <thread>

#include "gloo/transport/tcp/address.h"
#include "gloo/transport/tcp/context.h"
#include "gloo/transport/tcp/device.h"

namespace tcp = gloo::transport::tcp;

int main() {
  tcp::attr attributes("127.0.0.1");
  auto context = tcp::CreateDevice(attributes)->createContext(0, 2);
  context->setTimeout(std::chrono::seconds(5));
  auto& pair = context->createPair(1);

  // The peer's address is above the pair's, so that the pair waits for it.
  sockaddr_in peer = {};
  peer.sin_family = AF_INET;
  peer.sin_addr.s_addr = inet_addr("127.0.0.2");
  std::thread listener([&] {
    pair->connect(tcp::Address(reinterpret_cast<sockaddr*>(&peer),
                               sizeof(peer)).bytes());
  });
  // The bytes of the pair's address begin with the address itself.
  const auto bytes = pair->address().bytes();
  sockaddr_in address;
  std::memcpy(&address, bytes.data(), sizeof(address));
  const int peer_fd = socket(AF_INET, SOCK_STREAM, 0);
  if (connect(peer_fd, reinterpret_cast<sockaddr*>(&address),
              sizeof(address)) != 0) {
    std::cout << "no connection" << std::endl;
    return 1;
  }
  listener.join();

  char memory[64] = {};
  auto buffer = pair->createRecvBuffer(7, memory + 16, 48);
  // Bytes in all, operation, slot, offset, length, and the place in the buffer:
  // 16 bytes before its beginning.
  const size_t message[6] = {sizeof(message) + 16, 0, 7, 0, 16, size_t(-16)};
  char content[sizeof(message) + 16];
  std::memset(content, 'x', sizeof(content));
  std::memcpy(content, message, sizeof(message));
  if (write(peer_fd, content, sizeof(content)) != sizeof(content)) {
    return 1;
  }
  try {
    buffer->waitRecv();
  } catch (const std::exception&) {
    std::cout << "refused" << std::endl;
    _exit(0);
  }
  std::cout << (memory[0] == 'x' ? "written" : "untouched") << std::endl;
  _exit(0); // without the goodbyes of the pair
}
