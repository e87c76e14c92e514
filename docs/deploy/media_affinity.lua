-- Which picture or video a request is about, so that HAProxy can send what is about the same one to the same server.
--
-- Loaded by haproxy.cfg beside it. The action `lua.media_affinity` sets the variable `txn.medium` to a hash of the first
-- picture or video in the body of a request; it sets nothing where there is none. The first, because it stays the first
-- while a conversation goes on and more pictures come.
--
-- The same medium gives the same hash in whatever form it is sent: by chat, /v1/responses, /v1/messages or /generate, as
-- an object or a bare URL, in any spelling of JSON and of base64. A medium that has a "uuid" goes by that name alone, so
-- that a later request that sends only the name reaches the server that keeps what it names.
--
-- Nothing here decides whether a request is right: a body that is no JSON goes to a server, which says so.
--
-- The other connections of a thread wait for each call of Lua's own functions, and HAProxy ends itself where such calls take
-- two seconds. So every loop and every replacement has a bound. A body of 16 MiB takes less than a second of a busy core.

local DEEPEST = 64 -- levels of JSON; a conversation has seven
local MOST_STEPS = 200000 -- values, strings and escapes that are looked at; pixels are one string
local MOST_SPELLINGS = 1000000 -- replacements in base64; 16 MiB of what compressed files have in them need half as many

-- Where an item of each type has its URL, alone or in an object.
local URL_KEYS = {
  image_url = 'image_url',
  image = 'image',
  image_data = 'image_data',
  input_image = 'image_url',
  file = 'file',
  input_file = 'file_data',
  video_url = 'video_url',
  video = 'video',
}
local ESCAPES = { b = '\b', f = '\f', n = '\n', r = '\r', t = '\t', ['"'] = '"', ['\\'] = '\\', ['/'] = '/' }

-- What is left out of base64, or written otherwise.
local OTHER_SPELLINGS = { ['\r'] = '', ['\n'] = '', ['\t'] = '', [' '] = '', ['-'] = '+', ['_'] = '/' }

local PERCENT = {} -- what each escape of a URL stands for
for high in ('0123456789abcdefABCDEF'):gmatch('%x') do
  for low in ('0123456789abcdefABCDEF'):gmatch('%x') do
    PERCENT['%' .. high .. low] = string.char(tonumber(high .. low, 16))
  end
end

local function has(text, character)
  return text:find(character, 1, true) ~= nil -- as fast as memory, which no other pattern is
end

-- Replaces what is found by what a table has for it; nil where that is too much work.
local function replaced(text, pattern, by)
  local other, times = text:gsub(pattern, by, MOST_SPELLINGS)
  return times < MOST_SPELLINGS and other or nil
end

-- Base64 as every spelling of it decodes: one alphabet, no line breaks, no padding. Where that is too much work, a text
-- stays as it is: the same medium in the same spelling is still the same.
local function plain_base64(text)
  local plain = has(text, '%') and replaced(text, '%%%x%x', PERCENT) or text
  for character in pairs(OTHER_SPELLINGS) do
    if has(plain, character) then
      plain = replaced(plain, '[^%w+/]', OTHER_SPELLINGS) or text
      break
    end
  end
  local padding = plain:find('=', -3, true)
  return padding and plain:sub(1, padding - 1) or plain
end

-- A text that is the same for all spellings of a URL.
local function plain_url(url)
  local comma = url:sub(1, 5):lower() == 'data:' and url:find(',', 1, true)
  if not comma then return 'url ' .. url end
  local data = url:sub(comma + 1)
  local in_base64 = url:sub(6, comma - 1):lower():find(';%s*base64')
  return 'data ' .. (in_base64 and plain_base64(data) or data)
end

-- The medium that a URL, or an object around it, says; nil for none. `item` is what the object is in.
local function medium_of(own, item)
  local inner = type(own) == 'table' and own or type(item.source) == 'table' and item.source or {}
  local uuid = item.uuid or inner.uuid
  if type(uuid) == 'string' then return 'uuid ' .. uuid end
  local url = type(own) == 'string' and own or inner.url or inner.file_data or item.url
  if type(url) == 'string' and url ~= '' then return plain_url(url) end
  if type(inner.data) == 'string' then return 'data ' .. plain_base64(inner.data) end -- of Anthropic's API
  return nil
end

-- Finds the first medium of a body, or raises an error where the body is no JSON. It reads no further than it has to.
local function first_medium(body)
  local steps, found = 0, nil
  local read

  local function step()
    steps = steps + 1
    if steps > MOST_STEPS then error('too much to look at') end
  end

  local function skip_space(position) return body:match('^[ \n\r\t]*()', position) end

  -- What is beyond the basic plane comes as two escapes, a high and a low half.
  local high, end_of_low
  local function unescape(escape, hex, after)
    step()
    if escape ~= 'u' then return (ESCAPES[escape] or error('no escape')) .. hex end
    local code = #hex == 4 and tonumber(hex, 16) or error('no escape')
    if code >= 0xD800 and code < 0xDC00 then
      high, end_of_low = code - 0xD800, after + 6
      return ''
    end
    if after == end_of_low and code >= 0xDC00 and code < 0xE000 then
      code = 0x10000 + high * 1024 + code - 0xDC00
    end
    return utf8.char(code)
  end

  -- The string whose opening quote is at a position, and the position after it.
  local function read_string(position)
    local quote, before = position, nil
    repeat
      step()
      quote = body:find('"', quote + 1, true) or error('no end of a string')
      before = quote - 1
      while body:byte(before) == 92 and body:byte(before - 1) == 92 do -- '\', which another one escapes
        before = before - 2
        if before < quote - 16 then step() end -- no text within texts has so many
      end
    until body:byte(before) ~= 92
    local text = body:sub(position + 1, quote - 1)
    if has(text, '\\') then
      text = text:gsub('\\(.)(%x?%x?%x?%x?)()', unescape)
    end
    return text, quote + 1
  end

  -- Reads the values of an array or an object up to its end; `member` reads one, and returns the position after it.
  local function read_members(position, closing, member)
    position = skip_space(position + 1)
    if body:byte(position) == closing then return position + 1 end
    while true do
      position = member(position)
      if found then return position end
      position = skip_space(position)
      local byte = body:byte(position)
      if byte == closing then return position + 1 end
      if byte ~= 44 then error('no comma') end
      position = skip_space(position + 1)
    end
  end

  local function read_array(position, depth)
    local numbers = body:match('^%[[%d%s,.+eE-]*%]()', position) -- token ids, of which there can be very many
    if numbers then return {}, numbers end
    local array = {}
    position = read_members(position, 93, function(start)
      local value, after = read(start, depth)
      array[#array + 1] = value
      return after
    end)
    return array, position
  end

  local function read_object(position, depth)
    local object = {}
    position = read_members(position, 125, function(start)
      if body:byte(start) ~= 34 then error('no key') end
      local key, colon = read_string(start)
      colon = skip_space(colon)
      if body:byte(colon) ~= 58 then error('no colon') end
      local value, after = read(skip_space(colon + 1), depth)
      object[key] = value
      if depth == 1 and key == 'image_data' and not found then -- beside a raw prompt: one, or a list
        if type(value) == 'table' and value[1] ~= nil then value = value[1] end
        found = medium_of(value, {})
      end
      return after
    end)
    local key = URL_KEYS[object.type]
    if key and not found then found = medium_of(object[key], object) end
    return object, position
  end

  -- The value at a position, nil for what cannot be part of a medium, and the position after it.
  function read(position, depth)
    step()
    if depth >= DEEPEST then error('too deep') end
    local byte = body:byte(position)
    if byte == 34 then return read_string(position) end
    if byte == 123 then return read_object(position, depth + 1) end
    if byte == 91 then return read_array(position, depth + 1) end
    return nil, body:match('^[%w.+-]+()', position) or error('no value')
  end

  read(skip_space(1), 0)
  return found
end

core.register_action('media_affinity', { 'http-req' }, function(txn)
  local read, medium = pcall(first_medium, txn.f:req_body())
  if read and medium then txn:set_var('txn.medium', tostring(txn.c:xxh64(medium))) end
end)
